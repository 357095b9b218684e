"""Reports: pages, sections and charts."""
