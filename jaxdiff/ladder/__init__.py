"""--mode=ladder: all rungs of configs/ladder.py, and their tables."""
