"""`simclr-dist report`: runs side by side on one HTML page that needs nothing else.

record.py    what a run has written down: settings, curves, scores, environment
insight.py   what its encoder does to images: pairs, neighbours, map, confusion, similarities
figures.py   charts and pictures as data URIs
html.py      elements whose every text is escaped
page.py      the page
"""
