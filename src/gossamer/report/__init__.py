"""Tables and pages people look at."""

from gossamer.report.page import render_page, write_page

__all__ = ["render_page", "write_page"]
