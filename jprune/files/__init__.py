"""Files and folders: written whole or not at all, locked, and read with care; knows nothing of models."""
