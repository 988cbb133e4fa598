"""The command line of the fuzzer."""

import sys

from tools.fuzz.campaign import main

sys.exit(main())
