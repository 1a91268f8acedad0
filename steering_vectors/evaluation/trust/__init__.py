"""The trust suite: what steering does to toxicity, stereotype bias, machine ethics, truthfulness and privacy.

The five verticals of "More RLHF, More Trust?" (arXiv:2404.18870), each as a change against strength 0, from local
files. Knows nothing of commands or of display.
"""
