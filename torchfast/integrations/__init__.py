"""Where torchfast meets other frameworks: one file for each, importing its framework when it is imported."""
