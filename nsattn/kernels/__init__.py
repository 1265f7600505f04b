"""One file per operation and implementation, `<operation>_<implementation>.py`; `reference.py` defines them all."""
