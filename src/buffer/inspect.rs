//! Reading a buffer from outside.
