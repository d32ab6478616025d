"""What calibration would change, and why, so that a person sees it: figures, words, a page, a picture, a table.

    figures.build(Source(statistics, model)) -> Report     everything that the others show
    verdict                                                its meaning in words
    page.render(report.document()) -> str                  one HTML file
    picture.draw(report) -> Image                          one picture
    table.render(report) -> str                            one line per layer, as CSV

Importing the package imports none of them: the picture alone needs matplotlib.
"""
