//! One virtual CPU: its registers, its run loop and what each exit means.

pub mod decode;
pub mod registers;
