"""Sphinx's settings for the site that docs/site/build.py assembles. Nothing is fetched when a page is looked at."""

from simclr_dist import __version__

project = "simclr_dist"
author = "The simclr_dist maintainers"
copyright = "The simclr_dist maintainers, Apache-2.0"
release = version = __version__

extensions = ["myst_parser"]
root_doc = "index"
myst_heading_anchors = 6  # the anchors that GitHub gives
myst_links_external_new_tab = False
suppress_warnings = ["misc.highlighting_failure"]  # blocks with `…` and CAPITALS are no complete programs

html_theme = "furo"
html_title = f"simclr_dist {release}"
html_copy_source = False
html_show_sphinx = False
html_theme_options = {"top_of_page_buttons": []}
