"""``python -m cfsp_framework`` is ``cfsp``."""

from .cli import main

main()
