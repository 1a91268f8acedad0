"""How results are shown: HTML pages, plots, tables in the terminal."""
