"""Reports on what calibration would change, and why: a page, an image, a table, and words.

    figures.build(Source(statistics, model)) -> Report     the measurements
    verdict                                                their meaning in words
    page.render(report.document()) -> str                  one HTML file
    picture.draw(report) -> Image                          one image
    table.render(report) -> str                            CSV, one line per layer

Importing the package imports none of them: only `picture` needs matplotlib.
"""
