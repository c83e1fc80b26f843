"""The steps of a build, one file each: thin, because the work is in the packages that they call."""
