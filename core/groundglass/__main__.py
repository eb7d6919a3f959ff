"""``python -m groundglass``, the same as the command ``groundglass``."""

from groundglass.cli import main

main()
