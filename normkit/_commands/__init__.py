"""The commands of ``python -m normkit``, a file each.

``bench``, ``check`` and ``info`` measure on the machine of whoever asks: each framework runs in a
process of its own (``child.py``), on the layers that its adapter sets beside each other in
``backends/<name>/_compared.py``. ``inspect`` and ``diff`` look into files (``sources.py``).
"""


class RefusedError(Exception):
    """What was asked for cannot be done; the message says why."""
