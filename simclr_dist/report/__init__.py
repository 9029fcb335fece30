"""`simclr-dist report`: runs side by side on one HTML page that needs nothing else.

record.py    the records of a run: settings, curves, scores, environment
insight.py   what its encoder does with images: pairs, neighbours, map, confusion, similarities
figures.py   charts and images as data URIs
html.py      HTML elements; every text is escaped
page.py      the page
"""
