-----BEGIN PGP SIGNED MESSAGE-----
Hash: SHA512

{"critical":{"identity":{"docker-reference":"r.io/app:1"},"image":{"docker-manifest-digest":"sha256:6105d6cc76af400325e94d588ce511be5bfdbb73b437dc51eca43917d7a43e3d"},"type":"atomic container signature"},"optional":{"creator":"test","timestamp":1735776000}}
-----BEGIN PGP SIGNATURE-----

iQHEBAEBCgAuFiEEaUNeWJgkFafABXSQajlpYlZsaxAFAmd11wAQHHJzYUBleGFt
cGxlLmNvbQAKCRBqOWliVmxrEJ06C/47uHZvEar2Fzxv/FwLQ/vjEDf954tXMl+y
RqLljmcN+fWAArOPOo/ipOA25e0ZIxYU0o8vtyyIarbVgqDseoRoPul7WzB5MGgO
V8B0ndhUjiko+Ip8xKS17hI4k/qametglypuRDTTjRKZkQjdovvUzRtqFJdDxq89
cEhsLawTngEw3b92h9QtalKtcKwP4zHCJRA8BYyBlPHEr/PpwXY1Ojn2J/a32Qyw
RGv5ki9xW3+kGIJ7gSxRCaa+JVz4QNG6wdc8lD6acInqIMqbJplS7wuduF9nbJjr
6jHF3AsWp0uxeoJzt0w0k0Z8/3Ai/wSRj35FoRp73ePfHAFb0LcfAKHgwCnmEPRw
3288fcMDajtjOSaj2oymI0v9pzZWtSiB+OkC+m6uHa8Wy7Ys0qo3AYK1Qlqpx4uu
2sN+aLUXtlO8wiEevqPcmz+i9UDVEb12mzhGegDIcSxcnCc8VX92J/UPnxNym1bF
/2b9TjcplmuNc4nKShSAqeNYRJnNpkM=
=2dVw
-----END PGP SIGNATURE-----
