"""``python -m normkit bench``, ``check`` and ``info``: measured on the machine of whoever asks.

Each framework runs in a process of its own (``child.py``), on the layers that its adapter sets
beside each other in ``backends/<name>/_compared.py``.
"""


class RefusedError(Exception):
    """What was asked for cannot be done; the message says why."""
