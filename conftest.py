"""Runs the documentation: every Python block of README and docs, and every example in a docstring."""

from importlib.util import find_spec

from sybil import Sybil
from sybil.document import PythonDocStringDocument
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser
from sybil.parsers.rest import DocTestParser

# Sybil matches these with Path.match, in which no pattern stands for folders of any depth.
_pages = Sybil(
    parsers=[PythonCodeBlockParser(), SkipParser()], patterns=["README.md", "docs/*.md", "docs/*/*.md"]
)
# Gradio is heavier than all other test packages together, so its page runs only where it is installed.
_absent = [] if find_spec("gradio") else ["torchfast/integrations/gradio.py"]
_docstrings = Sybil(
    parsers=[DocTestParser()],
    patterns=["torchfast/*.py", "torchfast/*/*.py", "torchfast/*/*/*.py"],
    excludes=_absent,
    document_types={".py": PythonDocStringDocument},
)
pytest_collect_file = (_pages + _docstrings).pytest()
