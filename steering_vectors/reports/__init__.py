"""Reports: results and profiles on the terminal and as HTML pages. Measures nothing."""
