"""LLMJudge in a real Jupyter kernel, where an event loop is always running."""

import pytest
from judge_server import KEY, JudgeServer

CELL = """
import pandas as pd
import mechmisalign as mm

judge = mm.LLMJudge("openai/gpt-4o", base_url={url!r}, api_key={key!r}, journal=None)
for text in ("first", "second"):
    judged = judge(pd.DataFrame({{"prompt": ["q"], "response": [text]}}))
    print(judged["alignment_status"].tolist(), judge.controls_.passed)
"""


def test_a_cell_judges_twice_in_one_kernel():
    pytest.importorskip("ipywidgets", reason="Inspect asks for ipywidgets in notebooks")
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    with JudgeServer() as server:
        cell = nbformat.v4.new_code_cell(CELL.format(url=server.url, key=KEY))
        notebook = nbformat.v4.new_notebook(cells=[cell])
        nbclient.NotebookClient(notebook, timeout=300).execute()
    said = "".join(output["text"] for output in notebook.cells[0].outputs if output.get("name") == "stdout")
    assert said == "['scored'] True\n" * 2
