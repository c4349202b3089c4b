"""How the pages are built: `make docs`. Nothing in them is fetched from elsewhere."""

import lorary

project = "lorary"
author = "The lorary authors"
copyright = author
version = release = lorary.__version__

extensions = ["myst_parser"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
nitpicky = True
smartquotes = False  # `--set` is two hyphens

html_theme = "furo"
html_title = f"lorary {version}"
html_copy_source = False
html_theme_options = {"top_of_page_buttons": []}
