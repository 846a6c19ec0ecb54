"""``python -m sparsemm_eval.bench``: everything that is to be shown on a machine with a GPU."""

import sys

from sparsemm_eval.bench.acceptance import main

sys.exit(main())
