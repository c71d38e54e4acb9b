"""The network of a run: how long exchanges and the collectives of ZeRO take on one host and between hosts.

A host has ``gpus_per_host`` GPUs that a fast link joins. A fabric joins hosts, and every GPU has its own adapter to it,
as in the usual machines of eight. A transfer takes a latency, and its bytes divided by the slower of what it passes.
"""

from __future__ import annotations

from dataclasses import dataclass

from longnet_dist.estimate.devices import Device


@dataclass(frozen=True)
class Network:
    """A Network joins the GPUs of a run.

    Attributes:
        gpus_per_host: GPUs of a host.
        link: to the GPUs of the same host, bytes/s in one direction.
        fabric: from one GPU to other hosts, bytes/s in one direction.
        link_seconds: latency of one exchange on a host.
        fabric_seconds: what other hosts add to it.
    """

    gpus_per_host: int
    link: float
    fabric: float
    link_seconds: float
    fabric_seconds: float

    @classmethod
    def of(cls, device: Device) -> Network:
        """Return the network of machines with ``device``, with the shares of its peaks that collectives reach."""
        rates = device.rates
        return cls(
            device.gpus_per_host,
            device.link * rates.network,
            device.fabric * rates.network,
            rates.collective_seconds,
            rates.fabric_seconds,
        )

    def hosts(self, ranks: int) -> int:
        """Return the number of hosts of ``ranks`` ranks."""
        return -(-ranks // self.gpus_per_host)

    def exchange_seconds(self, near: float, far: float, ranks: int) -> float:
        """Return the time of an all-to-all in which a rank receives bytes from its own host and from others.

        Args:
            near: bytes from ranks of the same host.
            far: bytes from ranks of other hosts.
            ranks: that take part.
        """
        latency = self.link_seconds + (self.fabric_seconds if self.hosts(ranks) > 1 else 0.0)
        return latency + max(near / self.link, far / self.fabric)

    def ring_seconds(self, size: float, ranks: int) -> float:
        """Return the time of a reduce-scatter or an all-gather of ``size`` bytes over all ranks.

        NCCL builds as many rings as a host has adapters, so that a host sends through all of them at once.
        """
        if ranks == 1:
            return 0.0
        hosts = self.hosts(ranks)
        bandwidth = self.link if hosts == 1 else min(self.link, self.fabric * self.gpus_per_host)
        return self.link_seconds + (hosts - 1) * self.fabric_seconds + size * (ranks - 1) / ranks / bandwidth
