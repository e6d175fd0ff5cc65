"""Tables of runs and fits for the tests of `headway law`."""

from headway.lab.forecast import Facts
from tests.command import call


def csv(path, names, rows):
    path.write_text("\n".join([names, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return path


def facts(level):
    """The facts of a fit of no file."""
    return Facts("", "", 0, 0, level, 0.0, 0.0, 1e-3, (), ())


def fitted(path, *options):
    """Fit and return the file with what was printed."""
    done = call("law", "fit", path, *options, "--json")
    assert done.code == 0, done.err
    fit = path.with_suffix(".json")
    fit.write_text(done.out)
    return fit, done
