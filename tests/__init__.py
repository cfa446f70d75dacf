"""The tests of mvsplit: a package, so that no dependency's package of this name hides it."""
