"""Colours of the figures: Okabe & Ito 2008, told apart in print and by the colour-blind."""

BLUE, ORANGE, GREEN = "#0072B2", "#E69F00", "#009E73"
RED, PURPLE, SKY = "#D55E00", "#CC79A7", "#56B4E9"
GREY = "#666666"
