"""The helper and pages, under Node and in Chromium."""
