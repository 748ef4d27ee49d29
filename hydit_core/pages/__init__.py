"""Reports as pages: one HTML file each, which asks no network for anything, in light and dark."""
