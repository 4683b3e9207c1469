"""Which IP addresses are public: reachable for anybody, so that asking them shows a client nothing it could not see itself.

Python's own `is_global` is not enough: it holds multicast, 6to4 relays, unallocated IPv6 and IPv4 inside IPv6 for global, and
differs between patch releases.
"""

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

IPAddress = IPv4Address | IPv6Address

_NAT64 = IPv6Network("64:ff9b::/96")  # RFC 6052; the last 32 bits are an IPv4 address
_GLOBAL_UNICAST = IPv6Network("2000::/3")  # RFC 4291: all that has been given out
_NOT_PUBLIC_4 = [
    IPv4Network("192.0.0.0/24"),  # IETF protocol assignments, and the metadata service of a cloud
    IPv4Network("192.88.99.0/24"),  # 6to4 relays (RFC 7526)
    IPv4Network("168.63.129.16/32"),  # a cloud's host agent, at an address that looks public
    IPv4Network("224.0.0.0/4"),  # multicast
]
_NOT_PUBLIC_6 = [
    IPv6Network("2001::/23"),  # IETF protocol assignments, Teredo among them (RFC 4380)
    IPv6Network("2002::/16"),  # 6to4 (RFC 7526): holds an IPv4 address
    IPv6Network("3fff::/20"),  # documentation (RFC 9637)
]


def is_public(address: IPAddress) -> bool:
    """Whether the address is of the public Internet. IPv4 behind the well-known NAT64 prefix is judged as IPv4; any other form
    of IPv4 inside IPv6 is not public.

    Source: IANA's registries of special-purpose addresses.
    """
    if isinstance(address, IPv6Address):
        if address in _NAT64:
            return is_public(IPv4Address(int(address) & 0xFFFF_FFFF))
        return address in _GLOBAL_UNICAST and address.is_global and not any(address in network for network in _NOT_PUBLIC_6)
    return address.is_global and not any(address in network for network in _NOT_PUBLIC_4)
