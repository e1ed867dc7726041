"""Write the JSON files of this folder anew."""

from __future__ import annotations

from dashboards.written import FOLDER, written

for name, text in written().items():
    (FOLDER / name).write_text(text)
