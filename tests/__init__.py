"""The tests of mvsplit: a package, so that none of this name that a dependency installs hides it."""
