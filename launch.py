"""python launch.py --flowprefill: prefill server, decode server and gateway in one command (see --help)."""

import sys

from sgl_flowprefill.cluster.cli import main

if __name__ == "__main__":
    sys.exit(main())
