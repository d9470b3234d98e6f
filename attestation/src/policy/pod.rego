# The host names what runs, since a pod does; each container of `containers` is admitted, to the field, and no other.
process := input.OCI.Process

default HostProcessRequest := false

HostProcessRequest if {
	some container in containers
	container.image == input.image
	container.user != null
}

checked := [
	"image", "host_root", "OCI.Process.Args", "OCI.Process.Env", "OCI.Process.Cwd", "OCI.Process.User", "OCI.Process.Terminal",
	"OCI.Process.NoNewPrivileges", "OCI.Process.Capabilities", "OCI.Root.Readonly", "OCI.Mounts", "OCI.Linux.Devices",
	"OCI.Linux.Namespaces", "OCI.Linux.Sysctl", "OCI.Linux.Seccomp", "OCI.Linux.MaskedPaths", "OCI.Linux.ReadonlyPaths",
]

# What cannot be decided does not hold.
holds(container, "image") if input.image == container.image

holds(_, "host_root") if input.host_root == false

holds(container, "OCI.Process.Args") if process.Args == container.args

holds(container, "OCI.Process.Env") if {
	names := [variable(entry) | some entry in process.Env]
	count(names) == count(process.Env)
	count(names) == count({each | some each in names})
	every entry in process.Env { admits_variable(container, entry) }
	every wanted, value in container.env { concat("=", [wanted, value]) in process.Env }
}

holds(container, "OCI.Process.Cwd") if process.Cwd == container.cwd

holds(container, "OCI.Process.User") if admits_user(container, process.User)

# The image's own, which the guest looks up: not the host's, where the same image is a container's, too.
admits_user(container, _) if {
	container.user == null
	not HostProcessRequest
}

admits_user(container, user) if runs_as(container, user)

runs_as(container, user) if {
	user.UID == container.user.uid
	user.GID == container.user.gid
	every group in user.AdditionalGids { group in container.user.groups }
}

holds(container, "OCI.Process.Terminal") if process.Terminal == container.terminal

holds(container, "OCI.Process.NoNewPrivileges") if container.no_new_privileges == false

holds(_, "OCI.Process.NoNewPrivileges") if process.NoNewPrivileges == true

holds(container, "OCI.Process.Capabilities") if {
	every _, set in process.Capabilities {
		every capability in set { capability in container.capabilities }
	}
}

holds(container, "OCI.Root.Readonly") if input.OCI.Root.Readonly == container.read_only

holds(container, "OCI.Mounts") if {
	places := [mount.destination | some mount in input.OCI.Mounts]
	count(places) == count({each | some each in places})
	every mount in input.OCI.Mounts { admits_mount(container, mount) }
	every place, _ in container.mounts { place in places }
}

holds(_, "OCI.Linux.Devices") if input.OCI.Linux.Devices == []

holds(container, "OCI.Linux.Namespaces") if {
	every kind in container.namespaces { kind in input.OCI.Linux.Namespaces }
}

holds(container, "OCI.Linux.Sysctl") if {
	every parameter, value in input.OCI.Linux.Sysctl { value in container.sysctl[parameter] }
}

holds(container, "OCI.Linux.Seccomp") if container.seccomp == false

holds(_, "OCI.Linux.Seccomp") if input.OCI.Linux.Seccomp == true

holds(_, "OCI.Linux.MaskedPaths") if {
	every path in masked { path in input.OCI.Linux.MaskedPaths }
}

holds(_, "OCI.Linux.ReadonlyPaths") if {
	every path in read_only { path in input.OCI.Linux.ReadonlyPaths }
}

variable(entry) := split(entry, "=")[0] if is_string(entry)

admits_variable(container, entry) if {
	some wanted, value in container.env
	entry == concat("=", [wanted, value])
}

admits_variable(container, entry) if {
	not variable(entry) in object.keys(container.env)
	some pattern in container.others
	regex.match(pattern, entry)
}

# A volume of the pod.
admits_mount(container, mount) if {
	mount.writable == container.mounts[mount.destination].writable
	mount.type_ in [null, "bind", "none", "tmpfs"]
}

admits_mount(container, mount) if {
	not mount.destination in object.keys(container.mounts)
	mount.destination in container.engine_files
	mount.type_ in [null, "bind", "none"]
}

admits_mount(container, mount) if {
	not mount.destination in object.keys(container.mounts)
	mount.from_host == false
	mount.type_ in container.file_systems[mount.destination]
}

default CreateContainerRequest := false

CreateContainerRequest if {
	some container in containers
	every field in checked { holds(container, field) }
}

default ExecProcessRequest := false

ExecProcessRequest if {
	some container in joined
	input.process.Args in container.exec
	every entry in input.process.Env { admits_variable(container, entry) }
	input.process.Cwd == container.cwd
	runs_as(container, input.process.User)
	every _, set in input.process.Capabilities {
		every capability in set { capability in container.capabilities }
	}
}

# What the guest let in under the id in which the process is to run. The sandbox runs as nobody of the manifest.
joined contains container if {
	some container in containers
	input.container.image == container.image
	input.container.Args == container.args
	runs_as(container, input.container.User)
}

images := [container.image | some container in containers]

reasons contains {"field": "image", "value": input.image, "allowed": images} if {
	input.OCI
	not input.image in images
}

reasons contains {"field": field, "value": asked_value(container, field), "allowed": allowed_value(container, field)} if {
	some container in containers
	container.image == input.image
	some field in checked
	not holds(container, field)
}

asked_value(_, "OCI.Process.Env") := process.Env

asked_value(container, "OCI.Mounts") := [mount |
	some mount in input.OCI.Mounts
	not admits_mount(container, mount)
]

asked_value(_, field) := value if {
	not field in ["OCI.Process.Env", "OCI.Mounts"]
	value := object.get(input, split(field, "."), null)
}

allowed_value(container, "OCI.Process.Args") := container.args

allowed_value(container, "OCI.Process.Env") := [concat("=", [each, value]) | some each, value in container.env]

allowed_value(container, "OCI.Process.Cwd") := container.cwd

allowed_value(container, "OCI.Process.User") := container.user

allowed_value(container, "OCI.Process.Capabilities") := container.capabilities

allowed_value(container, "OCI.Process.Terminal") := container.terminal

allowed_value(container, "OCI.Root.Readonly") := container.read_only

allowed_value(container, "OCI.Mounts") := container.mounts

allowed_value(container, "OCI.Linux.Namespaces") := container.namespaces

allowed_value(container, "OCI.Linux.Sysctl") := container.sysctl

allowed_value(_, "OCI.Linux.Devices") := []

allowed_value(_, "OCI.Linux.MaskedPaths") := masked

allowed_value(_, "OCI.Linux.ReadonlyPaths") := read_only

allowed_value(_, field) := true if field in ["OCI.Process.NoNewPrivileges", "OCI.Linux.Seccomp"]

allowed_value(_, "host_root") := false

reasons contains {"field": "process.Args", "value": input.process.Args, "allowed": words} if {
	input.process
	words := [each |
		some container in joined
		some each in container.exec
	]
	not input.process.Args in words
}

reasons contains {"field": "process.Env", "value": entry, "allowed": allowed_value(container, "OCI.Process.Env")} if {
	some container in joined
	some entry in input.process.Env
	not admits_variable(container, entry)
}

reasons contains {"field": "process.Cwd", "value": input.process.Cwd, "allowed": container.cwd} if {
	some container in joined
	input.process.Cwd != container.cwd
}

reasons contains {"field": "process.User", "value": input.process.User, "allowed": container.user} if {
	some container in joined
	not runs_as(container, input.process.User)
}

reasons contains {"field": "process.Capabilities", "value": capability, "allowed": container.capabilities} if {
	some container in joined
	some _, set in input.process.Capabilities
	some capability in set
	not capability in container.capabilities
}

reasons contains {"field": "stdin", "value": true, "allowed": WriteStreamRequest} if input.stdin
