//! In place of `confidential` and `image` where the guest is built without them: for a VM without a TEE, whose host is trusted.
//!
//! Owns: that whatever would need them is refused, and that such an init does not serve in a TEE at all.

/// No owner speaks here, so every request is allowed.
pub mod confidential {
    use std::path::Path;

    use coffer_protocol::{ErrorKind, ImageSource, Request, SharedNamespace};
    use serde_json::Value;

    use super::image::Owner;
    use crate::container::ContainerError;

    /// A pod that was set up.
    pub struct Confidential(());

    /// There is no such thing.
    pub enum Sealed {}

    impl Sealed {
        /// Cannot be called.
        ///
        /// # Errors
        /// None.
        pub fn open_process(&self, _: &mut Value) -> Result<(), ContainerError> {
            match *self {}
        }

        /// Cannot be called.
        ///
        /// # Errors
        /// None.
        pub fn open(self, _: &str, _: &mut Value) -> Result<(), ContainerError> {
            match self {}
        }
    }

    fn refused(what: &str) -> ContainerError {
        let remedy = "this guest was built without it: boot images/smp.igvm";
        ContainerError::new(ErrorKind::Invalid, format!("{what}: {remedy}"))
    }

    /// Whether a kernel with support for a TEE runs in one. The kernel for one processor has no such support.
    fn in_a_tee(root: &Path) -> bool {
        let drivers = ["sys/devices/system/cpu/sev", "dev/sev-guest", "dev/tdx_guest", "dev/uv"];
        drivers.iter().any(|name| root.join(name).exists())
    }

    impl Confidential {
        /// Refuses initdata, and a TEE.
        ///
        /// # Errors
        /// [`ContainerError`].
        pub fn new(initdata: Option<&str>) -> Result<Self, ContainerError> {
            Self::below(Path::new("/"), initdata)
        }

        fn below(root: &Path, initdata: Option<&str>) -> Result<Self, ContainerError> {
            if initdata.is_some() {
                return Err(refused("initdata"));
            }
            if in_a_tee(root) {
                return Err(refused("an owner's policy, without which nothing runs in a TEE"));
            }
            Ok(Self(()))
        }

        /// Nobody.
        ///
        /// # Errors
        /// None.
        pub fn owner(&self) -> Result<Owner, ContainerError> {
            Ok(Owner)
        }

        /// Allows it.
        ///
        /// # Errors
        /// None.
        pub fn check(&mut self, _: &Request) -> Result<(), ContainerError> {
            Ok(())
        }

        /// Allows it.
        ///
        /// # Errors
        /// None.
        pub fn check_container(
            &mut self,
            _: &str,
            _: &Value,
            _: Option<&ImageSource>,
            _: &[SharedNamespace],
        ) -> Result<(), ContainerError> {
            Ok(())
        }

        /// There is no image that has one.
        pub fn remember_stop_signal(&mut self, _: &str, _: Option<u32>) {}

        /// Nobody.
        #[must_use]
        pub fn has_owner(&self) -> bool {
            false
        }

        /// Always.
        pub fn allows_command_lines(&mut self, _: &str) -> bool {
            true
        }

        /// Allows it.
        ///
        /// # Errors
        /// None.
        pub fn check_notify(&mut self, _: &str, _: &str, _: &Value) -> Result<(), ContainerError> {
            Ok(())
        }

        /// There is no image whose process it could be.
        pub fn allows_host_process(&mut self, _: &str, _: &Value, _: &ImageSource) -> bool {
            false
        }

        /// Always.
        pub fn allows_stdin(&mut self, _: &str) -> bool {
            true
        }

        /// Always.
        pub fn allows_output(&mut self, _: &str) -> bool {
            true
        }

        /// Refuses a process whose environment has sealed values.
        ///
        /// # Errors
        /// [`ContainerError`].
        pub fn sealed_process(&self, process: &Value) -> Result<Option<Sealed>, ContainerError> {
            let environment = process.get("env").and_then(Value::as_array).into_iter().flatten();
            if environment.filter_map(Value::as_str).any(|pair| pair.contains("=sealed.")) {
                return Err(refused("sealed values"));
            }
            Ok(None)
        }

        /// The same of a container's first process; files stay as they are.
        ///
        /// # Errors
        /// [`ContainerError`].
        pub fn sealed(&self, spec: &Value) -> Result<Option<Sealed>, ContainerError> {
            spec.get("process").map_or(Ok(None), |process| self.sealed_process(process))
        }

        /// There are none.
        pub fn show_credentials(&self, _: &mut Value) {}

        /// The limits are the host's.
        pub fn forbid_cores(&self, _: &mut Value) {}

        /// Nobody whose address would be asked for.
        pub fn ask_for_names(&mut self, _: &[String]) {}

        /// None were opened.
        pub fn forget(&mut self, _: &str) {}

        /// Nothing to serve.
        ///
        /// # Errors
        /// None.
        pub fn serve_workload(&mut self) -> Result<(), ContainerError> {
            Ok(())
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;
        use serde_json::json;

        #[test]
        fn what_needs_the_other_build_is_refused() {
            let root = tempfile::tempdir().unwrap();
            let new = |initdata| Confidential::below(root.path(), initdata);
            assert!(new(Some("")).err().unwrap().message.starts_with("initdata: "));
            let pod = new(None).unwrap();
            assert!(pod.sealed_process(&json!({ "env": ["A=1"] })).unwrap().is_none());
            let process = json!({ "env": ["A=1", "B=sealed.x"] });
            assert!(pod.sealed_process(&process).is_err());
            assert!(pod.sealed(&json!({ "process": process })).is_err());
            std::fs::create_dir_all(root.path().join("sys/devices/system/cpu/sev")).unwrap();
            assert!(new(None).err().unwrap().message.contains("in a TEE"));
        }
    }
}

/// No images but what the host shows as a directory.
pub mod image {
    use std::{
        io,
        os::fd::{AsFd, BorrowedFd},
    };

    use coffer_protocol::ImageSource;
    use serde_json::Value;
    use thiserror::Error;

    /// What nobody said.
    pub struct Owner;

    /// There are no trees.
    #[derive(Clone, Copy, Debug)]
    pub enum Room {
        /// As nobody asks.
        Memory,
        /// As nobody asks.
        Disk,
    }

    /// An image was asked for.
    #[derive(Debug, Error)]
    #[error("image {0}: this guest was built without the unpacking of images: boot images/smp.igvm")]
    pub struct ImageError(String);

    /// None.
    #[derive(Default)]
    pub struct Images(());

    /// There is no such thing.
    #[derive(Debug)]
    pub enum Unpacked {}

    /// Nor this.
    pub(crate) enum Unpacking {}

    impl Unpacking {
        pub(crate) fn give_up(&self) {
            match *self {}
        }

        pub(crate) fn end(self) -> io::Result<Result<Unpacked, ImageError>> {
            match self {}
        }
    }

    impl AsFd for Unpacking {
        fn as_fd(&self) -> BorrowedFd<'_> {
            match *self {}
        }
    }

    impl Images {
        /// Without an owner.
        #[must_use]
        pub fn new(_: Owner, _: Room) -> Self {
            Self(())
        }

        /// Refuses it.
        ///
        /// # Errors
        /// [`ImageError`].
        pub(crate) fn unpack(&mut self, _: &str, source: &ImageSource) -> Result<Unpacking, ImageError> {
            Err(ImageError(source.digest.clone()))
        }

        /// Nothing is there.
        pub fn remove(&self, _: &str) {}
    }

    impl Unpacked {
        /// Cannot be called.
        #[must_use]
        pub fn images_stop_signal(&self) -> Option<u32> {
            match *self {}
        }

        /// Cannot be called.
        #[must_use]
        pub fn stop_signal(&self, _: &Value) -> Option<u32> {
            match *self {}
        }

        /// Cannot be called.
        ///
        /// # Errors
        /// None.
        pub fn apply(self, _: &mut Value, _: bool) -> Result<(), ImageError> {
            match self {}
        }
    }
}
