"""Settings that hold for every test. Python finds `import tiny` because pytest puts this folder on sys.path."""

import os

# Before any library is imported: no test may reach for the network or for a display.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"
