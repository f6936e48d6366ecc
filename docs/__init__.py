"""The pages of the site are Markdown in this folder; ``docs.tools`` draws and writes what follows from code."""
