"""``python -m cfsp_framework`` is ``cfsp``."""

from cfsp_framework.cli.main import main

main()
