# Without a TEE and without a policy of the owner: the host could do anything anyway.
package agent_policy

import rego.v1

CreateSandboxRequest := true

UpdateInterfaceRequest := true

CreateContainerRequest := true

StartContainerRequest := true

ExecProcessRequest := true

SignalProcessRequest := true

WriteStreamRequest := true

ReadStreamRequest := true

PauseContainerRequest := true

UpdateContainerRequest := true

ListProcessesRequest := true

ListCommandLinesRequest := true

StatsContainerRequest := true

RemoveContainerRequest := true

DestroySandboxRequest := true
