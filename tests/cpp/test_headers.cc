// The headers of this target are precompiled (CMakeLists.txt). A target needs a file.
