"""Tools that judge models: `python eval/TOOL.py`, or `from eval import win_rate`."""
