//! What can be tested only about the repository as a whole: documents that repeat the code.

#[cfg(test)]
mod documents;
