"""Pages, sections and charts of reports."""
