"""One program of an emulated kernel: its groups of warps, its barriers, and what its engines have not finished.

Groups run one at a time, each in a thread of its own, until they must wait; which one goes on is drawn. What engines do
is finished as late as the kernel allows: a copy when somebody waits for its barrier, a product when it is waited for.
"""

from __future__ import annotations

import random
import threading

import numpy as np
import torch

from tests.gluon.memory import GROUPS
from tests.gluon.values import EmulationError

CLOCKS = 96  # of groups and barriers together
WARP = 32  # threads


class _Stopped(BaseException):
    """Ends the threads of a program that failed."""


class Group:
    """A group of warps that runs one function.

    Attributes:
        known: the latest time of every clock that the group knows of.
        products, stores, copies: what its engines have not finished, and ``copies`` that no barrier was told of.
        unfenced, leaving: tiles that it wrote, or that the copy engine read, since the last fence or barrier.
    """

    def __init__(self, program, number, function, arguments, threads):
        self.program, self.number, self.threads = program, number, threads
        self.name = f"group {number}"
        self.known = np.zeros(CLOCKS, dtype=np.int64)
        self.known[number] = 1
        self.products, self.stores, self.copies, self.unfenced, self.leaving = [], [], [], [], []
        self.waits_for, self.ready, self.done, self.error = "", lambda: True, False, None
        self.turn = threading.Event()
        self._call = (function, arguments)

    def run(self):
        """The body of its thread."""
        self.turn.wait()
        try:
            if not self.program.stopped:
                with torch.no_grad():  # a setting of the thread
                    self._call[0](*self._call[1])
        except _Stopped:
            pass
        except BaseException as error:
            self.error = error
        self.done = True
        self.program.back.set()

    def wait_until(self, ready, what):
        """Let other groups run until ``ready()``; now and then although it is."""
        if ready() and self.program.random.random() > 0.1:
            return
        self.waits_for, self.ready = what, ready
        self.turn.clear()
        self.program.back.set()
        self.turn.wait()
        if self.program.stopped:
            raise _Stopped

    def release(self, clock):
        """Tell ``clock``, an array as ``known``, all that the group knows."""
        np.maximum(clock, self.known, out=clock)
        self.known[self.number] += 1

    def learn(self, clock):
        np.maximum(self.known, clock, out=self.known)

    def fence(self):
        for tile in self.unfenced:
            tile.allocation.unfenced[tile.cells] = 0
        self.unfenced.clear()

    def meet_itself(self):
        """A barrier of all threads of the group."""
        for tile in self.leaving:
            tile.allocation.leaving[tile.cells] = 0
        self.leaving.clear()

    def finish_products(self, outstanding):
        while len(self.products) > outstanding:
            self.products.pop(0).finish(self)

    def finish_stores(self):
        for tile in self.stores:
            tile.end_reading(self, leaving=True)
        self.leaving += self.stores
        self.stores.clear()


class Barrier:
    """A barrier in shared memory (mbarrier): a phase ends with its arrivals and bytes."""

    def __init__(self, program):
        self.clock = program.new_clock()
        self.count, self.arrivals, self.bytes, self.phase = None, 0, 0, 0
        self.in_flight = []
        self._gathered, self._told = np.zeros((2, CLOCKS), dtype=np.int64)

    def index(self, number):
        assert int(number) == 0
        return self

    def init(self, count):
        self.count = count

    def arrive(self, group, count=1, expected=0):
        self._needs_init()
        group.release(self._gathered)
        self.bytes += expected
        self._arrived(count)

    def _arrived(self, count):
        self.arrivals += count
        if self.arrivals > self.count:
            raise EmulationError(f"{self.arrivals} arrivals at a barrier of {self.count}")
        if self.arrivals == self.count and self.bytes == 0:
            self.phase += 1
            self.arrivals = 0
            self._gathered[self.clock] = self.phase
            self._told = self._gathered.copy()

    def wait(self, group, parity):
        """Wait until the phase of ``parity`` has ended: the one before the present phase has that parity."""
        self._needs_init()

        def ended():
            self._deliver()
            return self.phase % 2 != parity

        group.wait_until(ended, f"phase {parity} of a barrier: {self.arrivals} of {self.count}, {self.bytes} bytes")
        group.learn(self._told)

    def _deliver(self):
        flying, self.in_flight = self.in_flight, []
        for copy in flying:
            copy.land()
            self.bytes -= copy.bytes
            if self.bytes < 0:
                raise EmulationError("more bytes come to a barrier than it expects")
            self._arrived(copy.arrivals)

    def _needs_init(self):
        if self.count is None:
            raise EmulationError("a barrier is used before it was initialised")


class NamedBarrier:
    """A barrier of the hardware (``bar.sync``, ``bar.arrive``): it counts threads, and begins anew."""

    def __init__(self, number):
        self.number, self.threads, self.expected, self.generation = number, 0, None, 0
        self._gathered, self._told = np.zeros(CLOCKS, dtype=np.int64), {}

    def arrive(self, group, threads):
        if self.expected not in (None, threads):
            raise EmulationError(f"barrier {self.number} is for {self.expected} threads, then for {threads}")
        self.expected = threads
        self.threads += group.threads
        if self.threads > threads:
            raise EmulationError(f"{self.threads} threads at barrier {self.number}, which is for {threads}")
        generation = self.generation
        group.release(self._gathered)
        if self.threads == threads:
            self._told[generation] = self._gathered.copy()
            self.threads, self.expected, self.generation = 0, None, generation + 1
        return generation

    def meet(self, group, threads):
        generation = self.arrive(group, threads)
        group.wait_until(
            lambda: self.generation > generation,
            f"barrier {self.number} of the hardware: {self.threads} of {threads} threads",
        )
        group.learn(self._told[generation])


class Program:
    """A program of a launch."""

    def __init__(self, number, threads, seed=0):
        self.number, self.threads = number, threads
        self.random = random.Random(seed * 1000003 + number)
        self.back, self.stopped = threading.Event(), False
        self.named, self.barriers, self._clocks = {}, [], GROUPS
        self.faults = set()  # reads that are allowed only if nothing comes of them
        self.groups = []
        self.group = Group(self, 0, None, (), threads)

    def new_clock(self):
        """The number of a new barrier's clock; the first are those of groups."""
        self._clocks += 1
        if self._clocks > CLOCKS:
            raise EmulationError("more barriers than the emulator has clocks")
        return self._clocks - 1

    def new_barrier(self):
        self.barriers.append(Barrier(self))
        return self.barriers[-1]

    def named_barrier(self, number):
        number = int(number)
        if not 0 <= number < 16:
            raise EmulationError(f"the hardware has no barrier {number}")
        return self.named.setdefault(number, NamedBarrier(number))

    def specialize(self, partitions, warps):
        """Run ``(function, arguments)`` of each group to its end."""
        sizes = [self.threads, *(WARP * number for number in warps)]
        self.groups = [Group(self, i, *x, sizes[i]) for i, x in enumerate(partitions)]
        threads = [threading.Thread(target=group.run, daemon=True) for group in self.groups]
        for thread in threads:
            thread.start()
        try:
            while alive := [group for group in self.groups if not group.done]:
                able = [group for group in alive if group.ready()]
                if not able:
                    waits = "; ".join(f"{group.name} waits for {group.waits_for}" for group in alive)
                    raise EmulationError(f"program {self.number} never ends: {waits}")
                self._let(self.random.choice(able))
        finally:
            self.stopped = True
            for group, thread in zip(self.groups, threads, strict=True):
                group.turn.set()
                thread.join()
        self._check_end()

    def _let(self, group):
        self.group = group
        self.back.clear()
        group.turn.set()
        self.back.wait()
        if group.error is not None:
            raise group.error

    def _check_end(self):
        """Raise if a program leaves something behind."""
        for group in self.groups:
            if group.products or group.stores or group.copies:
                raise EmulationError(f"{group.name} ends before its engines have read what they need")
        if any(barrier.in_flight for barrier in self.barriers):
            raise EmulationError("a program ends before a copy to its shared memory does")
        if left := [barrier.number for barrier in self.named.values() if barrier.threads]:
            raise EmulationError(f"a program ends with threads that wait, or were not met, at barriers {left}")
