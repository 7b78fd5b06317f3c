"""What is drawn: names in any script, whatever a notebook has set, and panels that show much."""

import numpy as np
import pytest
from conftest import ROOT, run_process
from matplotlib.figure import Figure
from PIL import Image

import report

# Of one character, an emoji.
BITMAP_FONT = """STARTFONT 2.1;FONT -test-emoji-medium-r-normal--16-160-75-75-c-80-iso10646-1
SIZE 16 75 75;FONTBOUNDINGBOX 8 16 0 -2;STARTPROPERTIES 4;FONT_ASCENT 14;FONT_DESCENT 2
CHARSET_REGISTRY "ISO10646";CHARSET_ENCODING "1";ENDPROPERTIES;CHARS 1;STARTCHAR dog
ENCODING 128054;SWIDTH 500 0;DWIDTH 8 0;BBX 8 1 0 0;BITMAP;FF;ENDCHAR;ENDFONT
""".replace(";", "\n")


@pytest.fixture
def fonts(monkeypatch, tmp_path):
    """Let the system's fonts be one of little pictures of one size."""
    from matplotlib import font_manager

    path = tmp_path / "emoji.ttf"
    path.write_text(BITMAP_FONT)
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda *_, **__: [str(path)])
    report.font_file.cache_clear()
    yield
    report.font_file.cache_clear()


def predictions(count=60, classes=2):
    rng = np.random.default_rng(0)
    actual = rng.integers(0, classes, count)
    probabilities = np.eye(classes)[actual] * 0.9 + 0.1 / classes
    return actual, probabilities


def test_names_that_no_font_can_write_are_boxes(fonts, tmp_path):
    actual, probabilities = predictions()
    labels = ["🐶", "fox 🦊"]
    report.draw_report(tmp_path / "r.png", "t 🐶", labels, actual, probabilities)
    arguments = (labels, actual, actual, lambda n: np.zeros((20, 20, 3), "uint8"))
    report.draw_confusion_matrix(tmp_path / "m.png", "m", "title 🐶", *arguments)
    names = np.asarray(Image.open(tmp_path / "m.png").convert("L"))[120:, :120]
    assert names.min() < 100  # the box
    assert Image.open(tmp_path / "m.png").info["Software"] == "finetuning-kit: m"
    assert Image.open(tmp_path / "r.png").width == 990


def test_the_settings_of_a_notebook_or_of_a_stranger_change_nothing(tmp_path):
    (tmp_path / "matplotlibrc").write_text("foo\x1b]0;x\x07: 1\ntext.usetex: True\nfigure.dpi: 1\n")
    code = "import numpy as np, report; "
    code += "report.draw_report('r.png', 't', ['a', 'b'], np.array([0, 1]), np.eye(2))"
    settings = {"PYTHONPATH": str(ROOT), "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    done = run_process("-Pc", tmp_path, code, **settings)
    assert (done.returncode, done.stderr) == (0, "")
    assert Image.open(tmp_path / "r.png").width == 990


def test_a_report_has_all_its_panels(tmp_path, monkeypatch):
    titles, save = [], Figure.savefig

    def note(figure, *some, **more):
        titles.append([axes.get_title("left").partition(" ")[0] for axes in figure.axes])
        save(figure, *some, **more)

    monkeypatch.setattr(Figure, "savefig", note)
    actual, probabilities = predictions()
    row = {"accuracy": 0.5, "val_accuracy": 0.6, "plain_accuracy": ""}
    history = [row, row | {"plain_accuracy": 0.7}]
    shares = np.linspace(0, 1, 5)
    strangers = (shares, 1 - shares, shares, 0.5, 0.4)
    for more in ((), (history, strangers)):
        report.draw_report(tmp_path / "r.png", "t", ["a", "b"], actual, probabilities, *more)
        assert Image.open(tmp_path / "r.png").width == 990
    assert titles == [["Reliability", "Classes"], "Learning Reliability Strangers Classes".split()]


@pytest.mark.parametrize(("count", "size"), [(3, (528, 258)), (40, (1388, 1242))])
def test_a_review_sheet_shows_its_pictures(tmp_path, count, size):
    colors = [np.full((30, 30, 3), (n * 5, 0, 255 - n * 5), "uint8") for n in range(count)]
    report.draw_review_sheet(
        tmp_path / "s.png", colors, ["a.jpg"] * count, ["Ann"] * count, ["王"] * count
    )
    sheet = Image.open(tmp_path / "s.png")
    assert sheet.size == size
    for n in range(count):
        middle = (12 + n % 8 * 172 + 80, 12 + n // 8 * 246 + 80)
        assert sheet.getpixel(middle) == (n * 5, 0, 255 - n * 5)
