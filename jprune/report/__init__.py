"""Measuring, drawing and the page of a report; knows no method and no kind of run."""
