"""Registrations for the time of one test."""

from contextlib import contextmanager


@contextmanager
def temporary_entries(*registries):
    """Forget afterwards what was registered from outside a registry's folder; its own files stay imported."""
    known = [set(registry._entries) for registry in registries]
    try:
        yield
    finally:
        for registry, names in zip(registries, known, strict=True):
            for name in set(registry._entries) - names - registry._files:
                del registry._entries[name]
