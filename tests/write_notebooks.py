"""Write each notebook with outputs from a run on the small models that the tests use: `make notebooks`."""

import os
import sys
import tempfile
from pathlib import Path

import jupytext
import nbformat

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.test_notebooks import NOTEBOOKS, run  # noqa: E402

for file in NOTEBOOKS:
    if sys.argv[1:] and file.stem not in sys.argv[1:]:
        continue
    os.environ["PYTHONPATH"] = str(ROOT)
    with tempfile.TemporaryDirectory() as folder:
        done = run(file, Path(folder))
    for cell, source in zip(done.cells, jupytext.read(file).cells, strict=True):
        cell.source = source.source
        # stderr holds only progress bars.
        cell.outputs = [o for o in cell.get("outputs", []) if o.get("name") != "stderr"] if "outputs" in cell else []
        if cell.cell_type != "code":
            del cell["outputs"]
    nbformat.write(done, file.with_suffix(".ipynb"))
    sys.stdout.write(f"wrote {file.with_suffix('.ipynb').name}\n")
