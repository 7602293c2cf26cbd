"""From workdirs to one HTML file that needs nothing else."""

import datetime
import functools
import itertools
import pathlib
from collections.abc import Sequence

import jinja2
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from jaxdiff.config.files import replacing
from jaxdiff.errors import ConfigError
from jaxdiff.report import text
from jaxdiff.report.curves import read_stages
from jaxdiff.report.pictures import LEVELS, Album, OverBudgetError
from jaxdiff.report.reading import read_ladders, read_runs
from jaxdiff.report.sections import SECTIONS, Context

GENERATOR = b'<meta name="generator" content="jaxdiff report">'  # of templates/page.html: such a file may be replaced
LIMIT = 15_000_000  # bytes of a report
RESERVE = 400_000  # of them for words and tables


def write_report(workdirs: Sequence[pathlib.Path], target: pathlib.Path, limit: int = LIMIT) -> pathlib.Path:
    """Write the report of `workdirs` to `target`, one HTML file of at most about `limit` bytes, replacing an older one.

    Pictures that would make it larger are made smaller or fewer, or are left out, and the report says so.

    Returns: `target`.

    Raises: ConfigError when a workdir has no config.json, or `target` is there and no report.
    """
    if target.exists() and (target.is_dir() or GENERATOR not in target.read_bytes()[:1000]):
        raise ConfigError(f"{target}: is there and no report of jaxdiff; give another file for the report")
    runs = read_runs(workdirs)
    stages = read_stages(runs)
    plotted = {chart.key: chart.item for stage in stages for chart in (*stage.main, *stage.others)}
    script, data = _bokeh(), htmlsafe_json_dumps(plotted)  # unsorted: Bokeh defines objects where it first has them
    fixed = len(script) + len(data) + RESERVE
    for level in LEVELS:
        album = Album(level, limit - fixed, strict=level is not LEVELS[-1])
        try:
            sections = [section for make in SECTIONS if (section := make(Context(runs, stages, album)))]
            break
        except OverBudgetError:
            continue
    rungs = {run.name: own.config.name for own in read_ladders(runs) for run in own.runs.values()}
    names = [run.name for run in runs if run.own]
    heading = list(dict.fromkeys(rungs.get(name, name) for name in names))
    page = (
        _environment()
        .get_template("page.html")
        .render(
            names=names,
            heading=heading,
            title=", ".join(heading),
            sections=sections,
            notes=album.notes(),
            plotted=data,
            bokeh=Markup(script),
            made=text.moment(datetime.datetime.now().timestamp()),
        )
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as partial:
        partial.write_text(page, encoding="utf-8")
    return target


def _bokeh() -> str:
    """The script of Bokeh, as it may stand inside <script>."""
    import bokeh

    path = pathlib.Path(bokeh.__file__).parent / "server" / "static" / "js" / "bokeh.min.js"
    return path.read_text(encoding="utf-8").replace("</script", "<\\/script")


def _environment() -> jinja2.Environment:
    loader = jinja2.PackageLoader("jaxdiff.report")
    environment = jinja2.Environment(
        loader=loader,
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"figures": text.figures, "setting": text.setting}
    environment.globals["counter"] = functools.partial(next, itertools.count())
    environment.globals["source"] = lambda name: Markup(loader.get_source(environment, name)[0])
    return environment
