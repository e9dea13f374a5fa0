"""Watch one forward of a model and read off what feeds each linear and what its output becomes."""
