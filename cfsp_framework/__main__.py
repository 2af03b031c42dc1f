"""``python -m cfsp_framework`` is ``cfsp``."""

from cfsp_framework.cli import main

main()
